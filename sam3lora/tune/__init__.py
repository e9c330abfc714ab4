"""Sweeps: which adapter settings work best on a data set.

``load_space`` (`space`) reads a search space, ``run_sweep`` (`sweep`) tries it with Ray Tune. A sweep folder:

    space.yaml      the space with its base configuration   trials.csv, trials.parquet  a row for each trial
    trials/0000/    a run folder and trial.json for each     best/        the best adapter, and how to train it again
    rejected.jsonl  samples that were never trained          sweep.json   what came out of it
                                                             sweep.html   the report
"""
