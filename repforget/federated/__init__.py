"""Federated training: clients that keep their records, a server that averages what they send, and leaving it again."""
