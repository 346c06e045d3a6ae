"""Where a chapter's wrong answers, and honest variants of right ones, are kept."""

from __future__ import annotations


def collectors():
    """(WRONG, HONEST, wrong, honest): two empty lists, and decorators that fill them.

    WRONG:  (question, answer, outcome, bug, points, provenance): what the checker must
            say of the answer, which bug it must name, the points that are left, and
            where the mistake was made
    HONEST: (question, answer) that the checker must accept
    """
    found, accepted = [], []

    def wrong(question, bug, points, provenance="", outcome="wrong"):
        def keep(answer):
            found.append((question, answer, outcome, bug, points, provenance))
            return answer

        return keep

    def honest(question):
        def keep(answer):
            accepted.append((question, answer))
            return answer

        return keep

    return found, accepted, wrong, honest
