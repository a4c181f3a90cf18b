"""Privacy traps, each run against Opacus, Flower's DP strategies and Siloweave. See ``benchmarks/conformance.py``."""
