"""XLA's flags for programs that are compiled often and run briefly, before JAX is imported."""
from importlib.metadata import version

# Compilation dominates the tests. Without LLVM's optimization it takes a third of the time, and sums keep the
# order they are written in; without fusions in MLIR, which only older versions can do without, half of that.
FAST = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if version('jaxlib').startswith('0.10.'):
  FAST += ' --xla_cpu_use_fusion_emitters=false'
