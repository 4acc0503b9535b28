"""The parts of scripts/gpu_check.py: what it checks, what it times, and what it writes."""
