"""Membership and privacy: can it be told that the forgotten items were ever trained on?"""
