"""Pages for whoever runs a silo or a federation, of figures that change while one looks."""
