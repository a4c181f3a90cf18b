"""A silo's side of secure aggregation: whom it adds up with, and the sums that it is in."""
