"""Training.

    fit.py         the loop: step, record, validate, save, roll back;   run.py   what it holds, and does
    opening.py     what it needs first, checked against the config and the checkpoint
    recording.py   what it writes about each step;   nonfinite.py   evidence of bad steps
    guards.py      which steps are bad;              replay.py      a step once more, to test the machine
    step.py        one step as a pure function;      optimizer.py   its AdamW
    processes.py   several processes as one job;     watch.py       steps that hang, signals
"""
