"""The side that owns data: admission, policy, charge, compute, release, which never imports coordinator/."""
