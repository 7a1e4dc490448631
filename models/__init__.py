"""The catalog: one TOML a known model."""
