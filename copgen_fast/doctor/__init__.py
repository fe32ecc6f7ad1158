"""What `python -m copgen_fast.doctor` finds out: the machine, the ops' accuracy, what the paper's runs would take."""
