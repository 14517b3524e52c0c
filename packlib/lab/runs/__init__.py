"""What measures: a run's spec and rig, one run in its process, a sweep of them."""
