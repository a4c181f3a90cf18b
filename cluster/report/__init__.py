"""Report.json and report.html."""
