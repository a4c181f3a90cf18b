"""What a silo answers before a run: whether one would work here, without a record and without a charge."""
