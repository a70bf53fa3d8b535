"""The autograder behind tests/exercise.py and tests/grade.py. See tests/GRADING.md."""
