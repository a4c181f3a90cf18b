"""What is looked at before or beside a run: the machine, the cost, the resume, the audit."""
