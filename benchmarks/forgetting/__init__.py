"""Does the choice of what is trained protect what a model knew? docs/evidence.md has the question and the method.

python -m benchmarks.forgetting --smoke                     a study of a minute, to see that all parts work
python -m benchmarks.forgetting --plan FILE --folder DIR    runs what is left of a plan
python -m benchmarks.forgetting --report --plan FILE --folder DIR
python -m benchmarks.forgetting --model MODEL --learn FILE ... --keep FILE ... --budget 2h    asks of your own model
"""
