"""Stimulative images: pictures that a key neuron answers to most (definitions §7; report, §3.4)."""
