"""Queries over finished stores."""

from classlens.analysis.scan import scan, scan_attribution, scan_images, scan_memories

__all__ = ["scan", "scan_attribution", "scan_images", "scan_memories"]
