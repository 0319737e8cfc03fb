"""Queries over finished stores."""

from classlens.analysis.scan import scan, scan_images, scan_memories

__all__ = ["scan", "scan_images", "scan_memories"]
