"""The engine: parts that stay where they are, sums over parts, checkpoints and memory plans. It knows no physics."""

from stemtomo.distributed.checkpoint import Checkpoint
from stemtomo.distributed.executor import Executor, Handle, executor
from stemtomo.distributed.memory import MemoryPlan, PlanRow, Usage, available_memory_bytes, cpu_seconds
from stemtomo.distributed.parts import Parts, Saved
from stemtomo.distributed.windows import Window
from stemtomo.process import peak_rss_mb

__all__ = [
    "Checkpoint",
    "Executor",
    "Handle",
    "MemoryPlan",
    "Parts",
    "PlanRow",
    "Saved",
    "Usage",
    "Window",
    "available_memory_bytes",
    "cpu_seconds",
    "executor",
    "peak_rss_mb",
]
