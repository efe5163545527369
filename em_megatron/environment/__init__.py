"""What this machine and its packages are fit for, as `launch/doctor.py` prints it.

Nothing here needs a working dependency to be imported: torch, Megatron-Core and the rest are imported inside the
probes, where an exception becomes a line of the report.
"""
