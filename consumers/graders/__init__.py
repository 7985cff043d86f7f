"""Graders: each module grades single responses in one respect. The grade stage runs them (consumers/grade.py)."""
