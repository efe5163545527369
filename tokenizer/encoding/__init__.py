"""How a corpus is encoded by any number of processes on one folder: scan, plan, encode, finish."""
