"""The record of a run: its journal, from which it resumes, and the tables and scores derived from it."""
