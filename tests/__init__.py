"""Tests by subject, a folder each; `helpers` is what they share. A package, so that its names stay its own."""
