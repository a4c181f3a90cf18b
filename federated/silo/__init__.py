"""The side that owns the data: admission, policy, charge, computation, release. It never imports coordinator/."""
