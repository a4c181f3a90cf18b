"""The certificate: what a run claims, and the offline check of that claim."""
