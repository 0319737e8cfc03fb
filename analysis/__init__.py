"""Queries over finished stores."""

from classlens.analysis.scan import scan, scan_images

__all__ = ["scan", "scan_images"]
