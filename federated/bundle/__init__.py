"""A signed folder for a site without internet: packages, base model, units, documents and a bill of materials."""
