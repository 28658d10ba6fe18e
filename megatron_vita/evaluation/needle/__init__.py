"""A needle in a haystack: one picture of a long video, or one sentence of a long text, is asked for."""
