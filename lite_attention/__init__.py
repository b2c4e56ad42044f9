"""LiteAttention: attention for serving and diffusion on NVIDIA Hopper."""

from lite_attention import pages
from lite_attention.calibration.calibrate import calibrate
from lite_attention.calibration.file import load_thresholds, save_thresholds
from lite_attention.calibration.thresholds import Thresholds
from lite_attention.collect import collect_stats, lite_modules
from lite_attention.interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from lite_attention.module import LiteAttention
from lite_attention.parallel.merge import merge_attention
from lite_attention.parallel.module import SeqParallelLiteAttention
from lite_attention.scheduler import get_scheduler_metadata, scheduler_metadata_size
from lite_attention.serving import stats
from lite_attention.skip.interface import skip_attention, skip_attention_varlen, skip_attention_with_kvcache
from lite_attention.skip.skip_list import SkipList
from lite_attention.skip.stats import StreamStats

__version__ = "0.1.0"

__all__ = [
    "LiteAttention",
    "SeqParallelLiteAttention",
    "SkipList",
    "StreamStats",
    "Thresholds",
    "__version__",
    "calibrate",
    "collect_stats",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "lite_modules",
    "load_thresholds",
    "merge_attention",
    "pages",
    "save_thresholds",
    "scheduler_metadata_size",
    "skip_attention",
    "skip_attention_varlen",
    "skip_attention_with_kvcache",
    "stats",
]
