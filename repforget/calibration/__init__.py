"""The judge is measured too: every metric and attack on organisms whose truth is known."""
