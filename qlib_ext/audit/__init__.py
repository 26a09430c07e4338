"""Audit a Qlib workflow for leaks of the future: `qlib-ext audit WORKFLOW.yaml`.

The workflow's data set is built and its model trained on copies of the store that agree
up to one day: cut there, or with other numbers, members or prices after it. What the
model sees and says before that day must be the same on all of them, and on copies that
part at period starts and ends; files outside the store are cut too. Further checks look
at what came with the data (industries, price levels, columns too good), fit windows,
purge, missing rows, graphs, batches and execution, and two train where there is nothing
to find. Works on any Qlib workflow on day bars.
"""

from qlib_ext.audit.checks import CHECKS
from qlib_ext.audit.run import Audit, audit
from qlib_ext.audit.subject import Settings, Subject
from qlib_ext.audit.verdict import Verdict

__all__ = ["CHECKS", "Audit", "Settings", "Subject", "Verdict", "audit"]
