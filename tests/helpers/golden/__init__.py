"""How each method answers a golden file: what the authors' own functions chose, on inputs that numpy makes again.

One module for each file of `tests/golden/`, named like it. It says

* `INPUTS`: the fields of a case that are given;
* `ROUNDED`, where there are such: the fields whose figures the file gives to fewer than five digits behind the point;
* `answer(case)`: what we find for the others, by the same names. All of them must be there.

Numbers are compared exactly where they are whole, else within 1e-5, or one of the last digit.
"""
