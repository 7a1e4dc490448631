"""What each target can do and likes: one TOML a target."""
