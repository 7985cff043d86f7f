"""`charter report`: write a run into one HTML file."""

from charter.report import report

COMMAND = report
