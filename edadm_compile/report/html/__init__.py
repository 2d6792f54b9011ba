"""The report: one HTML page without anything outside of it."""
