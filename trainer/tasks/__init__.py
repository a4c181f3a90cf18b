"""What a record is to the model: one file per task."""
