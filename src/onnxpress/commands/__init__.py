"""The commands: `make` (build, export, optimize), `measure` (evaluate, benchmark), `look` (inspect, run, verify…)."""
