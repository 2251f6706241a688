"""Weights in the formats of other frameworks: out by `export`, in by `importing`.

    tensors.py       tables of tensors, from which both directions follow
    format.py        what a format is
    blocks.py        tables and entries that formats share
    llama.py         llama, qwen2, qwen3: the trunk and future 0
    mimo.py          mimo: a dense trunk and one module, for vLLM and SGLang
    mellum.py        mellum: a dense trunk and one module, for transformers and vLLM
    deepseek.py      deepseek_v3, glm4_moe: experts and modules
    meta.py          meta: parallel heads
    fitting.py       which formats can hold a model
    detect.py        which format a folder has
    source.py        what an export reads
    tokenizers.py    tokenizer.json
    workdir.py       an imported model as a workdir
    safetensors.py   the files
    card.py          the page that goes with an export
    against.py       greedy decoding by transformers, to time it
"""
