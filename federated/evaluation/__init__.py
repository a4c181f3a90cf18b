"""Private metrics as bounded, noised sums: one vector, which silo and coordinator must read alike."""
