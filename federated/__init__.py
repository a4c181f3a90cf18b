"""Silos, their service, the rounds, and the local grid."""
