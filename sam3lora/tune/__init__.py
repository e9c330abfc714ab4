"""Sweeps: search for the adapter settings that work best on a data set.

`space.reader.load_space` reads a search space, `run.sweep.run_sweep` tries it with Ray Tune. A sweep folder holds

    space.yaml      the space with its base configuration   trials.csv, trials.parquet  a row for each trial
    trials/0000/    a run folder and trial.json for each    best/        the best adapter, and how to train it again
    rejected.jsonl  samples that were never trained         sweep.json   the results for programs
                                                            sweep.html   the report
"""
