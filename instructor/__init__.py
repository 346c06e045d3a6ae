"""Release, collect and grade the exercises of a class.

    python -m instructor release 04              the student assignment
    python -m instructor grade 04 SUBMISSIONS    grades.csv, a page a student, a report
    python -m instructor report 04               the class

nbgrader keeps the books. What students handed in is never run in the grader's own
process: `room` runs it in one that is thrown away.
"""
