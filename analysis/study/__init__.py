"""Studies: many runs, their analyses, and published numbers set beside ours."""

from classlens.analysis.study.parse import load_study
from classlens.analysis.study.plan import Study
from classlens.analysis.study.runner import run_study

__all__ = ["Study", "load_study", "run_study"]
