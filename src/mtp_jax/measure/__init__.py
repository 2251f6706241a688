"""What a config costs, and whether it does what it says.

    certify.py       gradients, influence and FLOPs of a small twin
    counts.py        parameters and FLOPs beside those of the next-token twin
    plan.py          a step compiled for a TPU slice that is not there; sweep.py tries many
    topology.py      descriptions of such slices
    plan_decode.py   passes of decoding, compiled likewise
    runs.py          what the report shows of a run
    traffic.py       bytes that a compiled step moves; hlo.py reads its text
    benchmark_*.py   train steps, data and decoding, as ratios within one run
"""
