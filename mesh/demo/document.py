"""What the demo's two nodes read: an invented place, written for this project, and questions about it.

The questions come last in a prompt, so that all of them share its beginning: that is what the mesh reuses.
"""

from __future__ import annotations

from typing import Final

DOCUMENT: Final = """\
The Tide Mill at Morrow's Reach

Morrow's Reach is a small town on the estuary of the river Ansel, where the salt water of the bay meets the
brown water of the hills. For almost three hundred years the town has been known for one building, the tide
mill, which stands on a stone causeway between the harbour and the marsh. A tide mill uses no river and no wind.
When the tide rises, the sea pushes open a wooden gate and fills a pond behind the causeway. When the tide
turns, the weight of the water in the pond shuts the gate again, and the miller waits until the sea outside has
fallen far enough. Then he lifts a sluice, and the water runs back to the sea under the floor of the mill and
turns the wheel on its way. The mill works twice a day, for about four hours each time, and because the tide
comes some fifty minutes later every day, the miller's hours wander around the clock. In one week he grinds at
noon and at midnight, and in the next at dawn and at dusk.

The mill was built in 1731 by Hester Morrow, a shipwright's widow. Her husband had left her a yard full of
seasoned oak and no orders for ships. The town council told her that nobody could build on the causeway, since
the mud there had swallowed two warehouses within living memory. Hester Morrow answered by driving four hundred
elm piles into the mud, each as long as a mast, and by laying a raft of oak across their heads. Elm that stays
wet does not rot, and the raft has not moved by more than a hand's width since. She carved the date over the
door with her own chisel, and below it a heron, because a heron had stood on the last pile every morning of that
summer, as if to inspect the work. The heron became the sign of the mill, then of its flour, and in the end of
the whole town.

The wheel is five metres across and has forty-eight paddles. It drives two pairs of millstones through a train
of wooden gears, whose teeth are made of apple wood so that a tooth breaks before an axle does. A broken tooth
costs an hour; a broken axle once cost a winter. The first pair of stones came from a quarry in the hills above
the Ansel and was good for barley only. The second pair was French, made of hard freshwater quartz, and was paid
for with the profit of a single season, in which a storm had stopped every windmill along the coast while the
tide went on coming in and going out. From that year dates the saying of the town that the wind is a guest and
the tide is a lodger.

The ledgers of the mill are complete. They lie in the town library in sixty-one volumes, bound in sailcloth, and
they tell more than the price of flour. Each line gives the date, the height of the tide in the pond, the hours
of work, the grain, its owner, and the toll, which was one sixteenth of the flour. In the margin the millers
wrote whatever else seemed worth a line. In March of 1774 there is a note that the pond froze and that the gate
was opened with axes. In the autumn of 1802 an eel as long as a man's arm stopped the wheel, and the miller
remarks that it was eaten. In 1816, the year without a summer, the line for the harvest is empty, and there is a
list of forty families who were given flour without a toll. The miller of that year, Josiah Pell, did not sell a
single sack from August to the following June. When the council thanked him with a silver cup, he used it to
measure salt.

In 1859 the railway reached the town, and with it came cheap flour from the steam mills of the city. The tide
mill lost half of its customers in three years. Agnes Pell, the granddaughter of Josiah, kept it alive by an
idea that people laughed at. She had noticed that the ledgers, with their daily heights of the water, were the
longest record of the tide anywhere on that coast, and that the figures in the harbour master's printed tables
were often wrong by a quarter of an hour. So she began to compute tables of her own. She sat in the loft above
the stones with four notebooks and a slide rule, and in the spring of 1863 she sold her first tables to the
captain of a coal barge for two shillings. Within ten years the pilots of nine harbours bought the Heron Tables,
as they were called, and no ship that used them went aground on the bar of the Ansel. A professor travelled from
the capital to find out which method the author used. He was shown up the ladder to the loft, where Agnes Pell
was greasing a bearing, and he is said to have asked her to fetch her father.

The method was simple, and she explained it to whoever wanted to hear it. A tide is the sum of many small waves,
she said, and each of them keeps its own time like a clock: one for the moon, one for the sun, one for the
moon's distance, and a dozen more for the shape of the bay. Nobody can see the clocks, but everybody can see the
sum of their hands. If you have the sum for long enough, and the ledgers had it for one hundred and thirty
years, you can work out each of the clocks, set them going again on paper, and read off tomorrow. She found
seventeen clocks for the Ansel. The professor had found eleven, and wrote a paper about the other six.

During the great flood of November 1911 the mill stood in water up to the second floor for two days. The miller
at that time was Tobias Wren, a quiet man who kept bees on the causeway. He had read in the Heron Tables that
the highest tide of the decade would fall on the night of the nineteenth, and when the wind went round to the
north-west that afternoon, he did not wait for the council. He rang the bell of the mill, which had not been
heard since the end of the war with the islands, and walked from door to door along the harbour with a lantern,
telling people to carry their beds to the church on the hill. Three hundred and twelve people spent the night
there. The water took the harbour master's office, the fish market and eighty metres of the railway, but nobody
drowned. On the wall of the mill a brass line marks the height of the flood, and above it hangs the lantern. The
bees, as Wren noted in the ledger, were moved in time.

The mill stopped grinding for trade in 1938. It was a store for nets, then a school for signallers, then nothing
at all. In the winter of 1962 the roof over the loft fell in, and the council voted by a single voice not to
pull the building down. The voice was that of Ines Calder, a teacher of mathematics, who had found the notebooks
of Agnes Pell in the library and had used them to teach her pupils how to add up waves. Over eleven years she
and her pupils, some of whom came back with pupils of their own, restored the gate, the sluice and one pair of
stones. They replaced nineteen of the forty-eight paddles and every tooth of the gears. On the first of May 1974
the wheel turned again, at twenty minutes past six in the morning, which was the minute that the tables gave.

Today the mill grinds on every Saturday, when the tide allows it, and sells its flour in bags with a heron on
them. A small turbine beside the wheel makes enough electricity for the mill, the library and the street lamps
of the causeway. The pond has become a reserve for birds, and the keeper opens the gate a little later in
spring, so that the nests at the edge stay dry. The ledgers go on as well. There is a gauge that measures the
water every six minutes and writes into a computer, but the miller still reads the staff in the pond with her
own eyes once a day and enters the height in volume sixty-one by hand. Asked why, she says that a figure
somebody has looked at is worth more than a figure nobody has looked at, and that if the two ever differ by more
than a thumb, one of them has something to tell her.

Visitors are advised to come two hours after high water, when the wheel is at its strongest. The times are
printed on the door, below the date and the heron. They are taken from the Heron Tables, which are still
computed with the seventeen clocks of Agnes Pell. In the year 2011 a student compared a whole century of the
tables with the heights that were really measured. The largest error was eleven minutes. It had happened on the
night of the great flood, when the wind held back the sea, and in the margin of the table somebody, most likely
Tobias Wren, had written in pencil: the tide was late, but I was not.
"""

NOTICE: Final = """\
Notice of the harbour master of Morrow's Reach

From the third of October the north basin is closed to all boats longer than nine metres. Divers will replace
the chains of the eastern moorings, which have lost a third of their thickness, and a barge with a crane will
lie across the entrance of the basin from one hour before low water until one hour after it. Boats that are
moored in the north basin now have to be moved to the coal quay by the evening of the second of October. The
crane barge shows two red lights by night. While the divers are below it flies a blue and white flag, and then
no boat may pass within sixty metres, under sail or under engine.

The ferry to the islands leaves from the fish market instead of the north pier. Its hours do not change.
Passengers with bicycles board first, since the gangway at the fish market is narrow. The fuel berth stays open,
but only between eight o'clock and noon. Fresh water can be had at the tide mill at any hour, by the kindness of
the miller, who asks that the gate of the pond be shut again behind every visitor. The work is expected to take
five weeks. If the weather stops it for more than three days, the harbour master will put up a new notice on the
door of the mill.
"""

QUESTION_FIRST: Final = "Summarize the history of the mill in one sentence."
QUESTION_OTHER_NODE: Final = "Why are the gears made of apple wood?"
QUESTION_AGAIN: Final = "What did Ines Calder do?"
QUESTION_AFTER: Final = "What is the mill used for today?"
QUESTION_NOTICE: Final = "From where does the ferry to the islands leave?"
