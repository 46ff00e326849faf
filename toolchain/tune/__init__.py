"""A search for the policy that gains most on development data, within what a phone can give."""
