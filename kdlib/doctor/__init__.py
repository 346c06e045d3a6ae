"""The doctor: from a batch, or from a run's metrics, to the likely cause.

    examine_batch(student, batch, objective, teacher=.., loss=..)   batch.py
    examine_run(folder)                                             run.py
    report(findings)                                                finding.py

A distillation that is wrong trains all the same: the loss is finite and falls. So the
doctor does not ask whether it falls. Of a batch it asks what each model read, which
positions get a gradient, and whether that is the gradient of the declared objective; of
a run, whether its numbers can be those of a healthy one. It answers with findings:
symptom, evidence, likely cause, remedy; or with none.

Every fault that it can name stands in kdlib/data/doctor.toml, every line that
it draws in thresholds.py.
"""

from __future__ import annotations

from kdlib.doctor.batch import examine_batch
from kdlib.doctor.finding import NOTHING, Finding, catalogue, report
from kdlib.doctor.run import examine_run
from kdlib.doctor.views import from_labels

__all__ = [
    "NOTHING",
    "Finding",
    "catalogue",
    "examine_batch",
    "examine_run",
    "from_labels",
    "report",
]
