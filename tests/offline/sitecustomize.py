"""Python runs this module at start-up in every process that the tests start."""

import no_network

no_network.install()
