"""What a silo's updates left out, kept until its next one (error feedback)."""
