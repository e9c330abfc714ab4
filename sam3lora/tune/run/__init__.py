"""Running a sweep: trials, their records and the outcome."""
